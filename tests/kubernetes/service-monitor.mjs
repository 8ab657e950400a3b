// Says on standard output, as JSON, what the operator's schema has against each of the ServiceMonitors on standard input.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

// The packages are not beside this file: node_packages.py installed them elsewhere.
const models = join(process.argv[2], "node_modules/@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/index.js");
const { ServiceMonitor } = await import(pathToFileURL(models));
const complaints = JSON.parse(readFileSync(0, "utf8")).map((monitor) => {
  try {
    new ServiceMonitor(monitor).validate();
    return "";
  } catch (error) {
    return String(error.message);
  }
});
process.stdout.write(JSON.stringify(complaints));
