// What a dashboard file may hold: Grafana's own types, narrowed to the panels that ours have. In JSON there are no enums,
// so each is the texts that it stands for; and no property is allowed that Grafana does not know.
import type { Dataquery } from '@grafana/grafana-foundation-sdk/prometheus';
import type { Dashboard, FieldConfig, FieldConfigSource, AnnotationQuery, Panel, RowPanel } from '@grafana/schema';
import type { FieldConfig as HeatmapField, Options as HeatmapOptions } from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type { Options as StatOptions } from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type { Options as TextOptions } from '@grafana/schema/dist/esm/raw/composable/text/panelcfg/x/TextPanelCfg_types.gen';
import type { FieldConfig as GraphField, Options as GraphOptions } from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

type Plain<T> = unknown extends T
  ? T
  : T extends string
    ? `${T}`
    : T extends number | boolean | null | undefined
      ? T
      : T extends Array<infer Item>
        ? Array<Plain<Item>>
        : { [Key in keyof T]: Plain<T[Key]> };

// Of Grafana's Prometheus data source, which is no part of the schema; all of what ours say is to be said.
type Said = 'datasource' | 'editorMode' | 'expr' | 'format' | 'instant' | 'legendFormat' | 'range' | 'refId';
type Query = Required<Pick<Dataquery, Said>>;

interface Alerts extends Omit<AnnotationQuery, 'target'> {
  tagKeys?: string;
  target?: { expr: string; interval: string; refId: string };
  textFormat?: string;
  titleFormat?: string;
}

type Known<T> = { [Key in keyof T as string extends Key ? never : Key]: T[Key] };

interface Shown extends Omit<Panel, 'type' | 'options' | 'targets' | 'fieldConfig'> {
  description: string;
  gridPos: NonNullable<Panel['gridPos']>;
  id: number;
  title: string;
}

interface Queried<Kind extends string, Options, Field> extends Shown {
  fieldConfig: Omit<FieldConfigSource, 'defaults'> & { defaults: Omit<Known<FieldConfig>, 'custom'> & { custom?: Partial<Field>; unit: string } };
  options: Options;
  targets: Query[];
  type: Kind;
}

type OurPanel =
  | Queried<'timeseries', GraphOptions, GraphField>
  | Queried<'stat', StatOptions, never>
  | Queried<'heatmap', HeatmapOptions, HeatmapField>
  | (Shown & { options: TextOptions; type: 'text' })
  | RowPanel;

interface Ours extends Omit<Dashboard, 'panels' | 'annotations'> {
  annotations: { list: Array<AnnotationQuery | Alerts> };
  panels: OurPanel[];
  title: string;
  uid: string;
}

export type DashboardFile = Plain<Ours>;
// What is ours is Grafana's as well.
export const asGrafanas = (file: DashboardFile): Plain<Dashboard> => file;
