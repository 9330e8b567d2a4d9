/** The API's team, and the fields of its form beside its limits. */

import type { Schema } from "../../kit/SchemaForm.svelte";
import { strings } from "../../strings";
import type { BudgetLimit } from "../keys/limits";

export interface Team extends Record<string, unknown> {
  id: string;
  weight: number;
  budgets: BudgetLimit[] | null;
  created_at: number;
  expires_at: number | null;
  effective_limits: Record<string, unknown>;
  webhook_secret?: string;
}

const text = strings.teams;
export const WEIGHT: Schema = { type: "integer", title: text.columns.weight, description: text.weightHint, minimum: 1, maximum: 100, default: 1 };
export const NEW_TEAM: Schema = {
  properties: { id: { type: "string", title: text.columns.id, description: text.idHint, maxLength: 200 }, weight: WEIGHT },
};
