/** Sending a form: the API's error stands beside the field that its `param` names. */

import { ApiError, messageOf } from "./api";

export class FormState {
  busy = $state(false);
  /** Errors by field. */
  errors = $state<Record<string, string>>({});
  /** An error that names no field of the form. */
  error = $state("");

  /** `fields`: the names that the form shows; an error about another one is shown above the buttons. */
  constructor(private readonly fields: () => string[]) {}

  /** Return what `work` returns; undefined if it failed, which the form then shows. */
  async submit<T>(work: () => Promise<T>): Promise<T | undefined> {
    this.busy = true;
    this.clear();
    try {
      return await work();
    } catch (error) {
      this.show(error);
      return undefined;
    } finally {
      this.busy = false;
    }
  }

  clear(): void {
    this.errors = {};
    this.error = "";
  }

  show(error: unknown): void {
    const param = error instanceof ApiError ? (error.param ?? "") : "";
    const fields = this.fields();
    const field = fields.find((name) => param === name || param.startsWith(`${name}.`) || param.startsWith(`${name}[`));
    if (field) this.errors = { [field]: messageOf(error) };
    else this.error = messageOf(error);
  }
}
