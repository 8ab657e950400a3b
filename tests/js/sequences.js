// Drives interleaved sequences over one ModelStreamInfer call: node sequences.js INCLUDE_DIR TARGET MODEL < SEQUENCES
//
// SEQUENCES is JSON: [{id, typed, steps: [[[numbers of a time step], ...], ...]}, ...]. Prints as JSON the answers, by
// sequence and step: [[[numbers], ...], ...], with what each response said of itself.

"use strict";

const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");
const fs = require("fs");

const [, , includeDir, target, model] = process.argv;
const sequences = JSON.parse(fs.readFileSync(0, "utf8"));

const definition = protoLoader.loadSync("conveyor_proto/inference/service.proto", {
  includeDirs: [includeDir],
  keepCase: true,
  longs: Number,
  oneofs: true,
});
const { inference } = grpc.loadPackageDefinition(definition);
const client = new inference.GRPCInferenceService(target, grpc.credentials.createInsecure());

function request(sequence, step) {
  const rows = sequence.steps[step];
  const flat = rows.flat();
  const input = { name: "x", datatype: "FP32", shape: [rows.length, rows[0].length] };
  const idParam = typeof sequence.id === "string" ? { string_param: sequence.id } : { int64_param: sequence.id };
  const message = {
    model_name: model,
    id: `${sequences.indexOf(sequence)}/${step}`,
    parameters: {
      sequence_id: idParam,
      sequence_start: { bool_param: step === 0 },
      sequence_end: { bool_param: step === sequence.steps.length - 1 },
    },
    inputs: [input],
  };
  if (sequence.typed) {
    input.contents = { fp32_contents: flat };
  } else {
    message.raw_input_contents = [Buffer.from(Float32Array.from(flat).buffer)];
  }
  return message;
}

function floats(bytes) {
  return Array.from({ length: bytes.length / 4 }, (_, index) => bytes.readFloatLE(4 * index));
}

function fail(error) {
  console.error(error);
  process.exitCode = 1;
  client.close();
}

const answers = sequences.map(() => []);
const call = client.ModelStreamInfer({ deadline: Date.now() + 60000 });

call.on("data", (reply) => {
  if (reply.error_message) {
    fail(`an answer is an error: ${reply.error_message}`);
    call.cancel();
    return;
  }
  const response = reply.infer_response;
  const [sequence, step] = response.id.split("/").map(Number);
  if (answers[sequence].length !== step) {
    fail(`${response.id} came after ${answers[sequence].length} answers of its sequence`);
    call.cancel();
    return;
  }
  const [output] = response.outputs;
  answers[sequence].push({
    name: output.name,
    datatype: output.datatype,
    shape: output.shape,
    final: response.parameters.triton_final_response.bool_param,
    values: floats(response.raw_output_contents[0]),
  });
});
call.on("error", fail);
call.on("end", () => {
  if (process.exitCode) return;
  process.stdout.write(JSON.stringify(answers));
  client.close();
});

// One step of each sequence that has one left, then the next of each: all of them are on their way at once.
const longest = Math.max(...sequences.map((sequence) => sequence.steps.length));
for (let step = 0; step < longest; step += 1) {
  for (const sequence of sequences) {
    if (step < sequence.steps.length) call.write(request(sequence, step));
  }
}
call.end();
