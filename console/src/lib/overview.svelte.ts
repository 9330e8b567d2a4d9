/** What happens now, live: the overview of all gateways, kept while a connection is lost. */

import type { ApiError } from "./api";
import { follow, type StreamState } from "./events";

export type Lane = "priority" | "default" | "flex";
export const LANES: Lane[] = ["priority", "default", "flex"];

export interface ModelRow {
  model: string;
  state: "ready" | "paused" | "held" | "unhealthy" | "unserved";
  waiting: Record<Lane, number>;
  running: number;
  slots: number;
  oldest_queued_at: number | null;
  eta_seconds: number | null;
  tokens_per_second: number;
  errors: number;
  dead_letters: number;
  workers: number;
  loaded: boolean | null;
  loading: boolean;
}

export interface AttentionItem {
  kind: string;
  severity: "critical" | "warning";
  subject: string;
  message: string;
  action: string;
  count: number | null;
}

interface Frame {
  at: number;
  stale_since: number | null;
  gateways: number;
  models: ModelRow[];
  removed?: string[];
  attention?: AttentionItem[];
}

/** The gateway sends each second; after this silence the connection counts as lost. */
const SILENCE_MS = 4_000;

export class Overview {
  rows = $state.raw<ModelRow[] | null>(null);
  attention = $state.raw<AttentionItem[]>([]);
  staleSince = $state<number | null>(null);
  gateways = $state(0);
  stream = $state<StreamState>("connecting");
  error = $state.raw<ApiError | null>(null);

  apply(kind: string, frame: Frame): void {
    if (kind === "overview") this.rows = frame.models;
    else if (this.rows && (frame.models.length || frame.removed)) {
      const changed = new Map(frame.models.map((row) => [row.model, row]));
      const gone = new Set(frame.removed ?? []);
      const kept = this.rows.filter((row) => !gone.has(row.model)).map((row) => take(changed, row.model) ?? row);
      this.rows = changed.size ? [...kept, ...changed.values()].sort((a, b) => (a.model < b.model ? -1 : 1)) : kept;
    }
    if (frame.attention) this.attention = frame.attention;
    this.staleSince = frame.stale_since;
    this.gateways = frame.gateways;
  }
}

function take<K, V>(map: Map<K, V>, key: K): V | undefined {
  const value = map.get(key);
  map.delete(key);
  return value;
}

/** Follow the overview while the component lives. Must be called while it is set up. */
export function followOverview(): Overview {
  const overview = new Overview();
  $effect(() =>
    follow("/v1/overview/events", {
      silenceMs: SILENCE_MS,
      onEvent: ({ event, data }) => overview.apply(event, JSON.parse(data) as Frame),
      onState: (state) => (overview.stream = state),
      onError: (error) => (overview.error = error),
    }),
  );
  return overview;
}

export const waitingOf = (row: ModelRow): number => LANES.reduce((sum, lane) => sum + row.waiting[lane], 0);
