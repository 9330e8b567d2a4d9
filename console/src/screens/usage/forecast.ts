/** What a budget will have used at the end of its period, if it goes on as until now. */

export interface Budget {
  holder: "team" | "key";
  holder_id: string;
  unit: "tokens" | "slot_seconds" | "cost";
  currency: string | null;
  period: "day" | "week" | "month";
  amount: number;
  warn_at: number | null;
  spent: number;
  reserved: number;
  left: number;
  starts_at: number;
  renews_at: number;
}

/** Below this part of the period, what was used says little about the rest. */
const LEAST_ELAPSED = 0.03;

/** Return the use expected at the end of the period; null: it is too early to say. */
export function forecast(budget: Budget, now: number): number | null {
  const elapsed = (now - budget.starts_at) / (budget.renews_at - budget.starts_at);
  return elapsed < LEAST_ELAPSED ? null : budget.spent / Math.min(1, elapsed);
}

/** Return when the budget is used up, in Unix seconds; null: not within the period. */
export function exhaustedAt(budget: Budget, now: number): number | null {
  if (budget.spent >= budget.amount) return now;
  const expected = forecast(budget, now);
  if (expected === null || expected <= budget.amount) return null;
  return budget.starts_at + ((now - budget.starts_at) * budget.amount) / budget.spent;
}
