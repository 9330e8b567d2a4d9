/** The limits of keys and teams, as a form's schema; the names are the API's. */

import type { Schema } from "../../kit/SchemaForm.svelte";
import { strings } from "../../strings";

const text = strings.limits;
const count = (title: string, description: string, minimum = 1): Schema => ({ type: "integer", title, description, minimum });
const list = (title: string, description: string, example: string): Schema => ({
  type: "array",
  items: { type: "string" },
  title,
  description,
  examples: [example],
});

export const LIMITS: Record<string, Schema> = {
  models: list(text.models, text.modelsHint, "llama*, gpt-oss-20b"),
  lanes: list(text.lanes, text.lanesHint, "default, flex"),
  networks: list(text.networks, text.networksHint, "10.0.0.0/8"),
  requests_per_minute: count(text.requests_per_minute, text.rateHint),
  tokens_per_minute: count(text.tokens_per_minute, text.rateHint),
  max_open: count(text.max_open, text.max_openHint),
  max_queued: count(text.max_queued, text.max_queuedHint, 0),
  max_running: count(text.max_running, text.max_runningHint),
  max_batches: count(text.max_batches, text.max_batchesHint, 0),
  max_webhooks: count(text.max_webhooks, text.max_webhooksHint),
  max_stored_bytes: count(text.max_stored_bytes, text.max_stored_bytesHint, 0),
  max_pending_bytes: count(text.max_pending_bytes, text.max_pending_bytesHint, 0),
  max_result_bytes: count(text.max_result_bytes, text.max_result_bytesHint, 0),
  retain: { oneOf: [{ const: "none", title: text.retainNone }], title: text.retain, description: text.retainHint },
  budget_webhook: { type: "string", title: text.budget_webhook, description: text.budget_webhookHint },
};

export interface BudgetLimit {
  unit: "tokens" | "slot_seconds" | "cost";
  amount: number;
  period: "day" | "week" | "month";
  warn_at?: number | null;
}

/** Return the fields of a record that are set, for a form. */
export function setFields(record: Record<string, unknown>, names: string[]): Record<string, unknown> {
  return Object.fromEntries(names.filter((name) => record[name] != null).map((name) => [name, record[name]]));
}

/** Return the body of a PATCH: what differs from the record; null removes a limit. */
export function changes(before: Record<string, unknown>, after: Record<string, unknown>, names: string[]): Record<string, unknown> {
  const found: Record<string, unknown> = {};
  for (const name of names) {
    const old = before[name] ?? null;
    const value = after[name] ?? null;
    if (JSON.stringify(old) !== JSON.stringify(value)) found[name] = value;
  }
  return found;
}

/** Return the limits that a record sets, in short: `600 requests/min, 4 running`. */
export function summary(record: Record<string, unknown>): string {
  return Object.entries(text.short)
    .filter(([name]) => record[name] != null)
    .map(([name, write]) => write(record[name] as never))
    .join(", ");
}
