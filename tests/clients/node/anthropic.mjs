// What Anthropic's official Node SDK makes of Nexus, as one JSON object on stdout: test name -> what was seen.
import Anthropic from "@anthropic-ai/sdk";

const { NEXUS_URL, NEXUS_KEY } = process.env;
const options = { baseURL: NEXUS_URL, apiKey: NEXUS_KEY, maxRetries: 0, timeout: 20_000 };
const client = new Anthropic(options);
const ask = { model: "echo", max_tokens: 20, messages: [{ role: "user", content: "one two three" }] };

async function collect(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

async function failure(call) {
  try {
    await call();
  } catch (error) {
    const { status, message, requestID } = error;
    return { name: error.constructor.name, status, type: error.error?.error?.type, message, requestID };
  }
  return null;
}

async function batch() {
  const created = await client.messages.batches.create({
    requests: ["a", "b"].map((custom_id) => ({ custom_id, params: ask })),
  });
  let found = created;
  for (let tries = 0; found.processing_status !== "ended" && tries < 200; tries++) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    found = await client.messages.batches.retrieve(created.id);
  }
  return { counts: found.request_counts, results: await collect(await client.messages.batches.results(found.id)) };
}

const tests = {
  answer: () => client.messages.create(ask),
  stream: async () => (await collect(await client.messages.create({ ...ask, stream: true }))).map(({ type }) => type),
  helper: () => client.messages.stream(ask).finalMessage(),
  models: async () => (await collect(client.models.list({ limit: 2 }))).map(({ id }) => id),
  batch,
  unknownModel: () => failure(() => client.messages.create({ ...ask, model: "none" })),
  wrongKey: () => failure(() => new Anthropic({ ...options, apiKey: "sk-secret-and-wrong" }).messages.create(ask)),
  wrongField: () => failure(() => client.messages.create({ ...ask, temperature: "warm" })),
  tooLarge: () => failure(() => client.messages.create({ ...ask, system: "x".repeat(33 << 20) })),
  brokenStream: () =>
    failure(async () => collect(await client.messages.create({ ...ask, stream: true, echo: { fail: "mid", delay_ms: 50 } }))),
};

const seen = {};
for (const [name, test] of Object.entries(tests)) {
  try {
    seen[name] = await test();
  } catch (error) {
    seen[name] = { unexpected: `${error.constructor.name}: ${error.message}` };
  }
}
console.log(JSON.stringify(seen));
