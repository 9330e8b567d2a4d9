/** Short messages about what was done, and errors of actions. */

import { ApiError, messageOf } from "./api";

export interface Toast {
  id: number;
  kind: "done" | "error";
  text: string;
  requestId?: string | null;
}

const DONE_MS = 4_000;

class Toasts {
  list = $state<Toast[]>([]);
  private last = 0;

  done(text: string): void {
    const id = this.add({ kind: "done", text });
    setTimeout(() => this.close(id), DONE_MS);
  }

  /** Show an error, which stays until it is closed. A session that has ended says so itself. */
  error(error: unknown): void {
    if (error instanceof ApiError && error.status === 401) return;
    this.add({ kind: "error", text: messageOf(error), requestId: error instanceof ApiError ? error.requestId : null });
  }

  close(id: number): void {
    this.list = this.list.filter((toast) => toast.id !== id);
  }

  private add(toast: Omit<Toast, "id">): number {
    this.last += 1;
    this.list = [...this.list.slice(-4), { ...toast, id: this.last }];
    return this.last;
  }
}

export const toasts = new Toasts();
