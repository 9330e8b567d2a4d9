// What the official Node SDK makes of Nexus, as one JSON object on stdout: test name -> what was seen.
import OpenAI from "openai";

const { NEXUS_URL, NEXUS_KEY, NEXUS_MODELS } = process.env;
const options = { baseURL: `${NEXUS_URL}/v1`, apiKey: NEXUS_KEY, maxRetries: 0, timeout: 20_000 };
const client = new OpenAI(options);
const messages = [{ role: "user", content: "one two three" }];
const ask = { model: "echo", messages };

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

async function failure(call) {
  try {
    await call();
  } catch (error) {
    const { status, code, param, type, message, requestID } = error;
    return { name: error.constructor.name, status, code, param, type, message, requestID };
  }
  return null;
}

const tests = {
  answer: () => client.chat.completions.create(ask),
  stream: async () => collect(await client.chat.completions.create({ ...ask, stream: true })),
  usage: async () =>
    collect(await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } })),
  helper: () => client.chat.completions.stream(ask).finalChatCompletion(),
  completion: () => client.completions.create({ model: "echo", prompt: "to be" }),
  models: async () => (await collect(await client.models.list())).map(({ id, object, created, owned_by }) => ({ id, object, created, owned_by })),
  retrieved: async () => {
    const ids = [];
    for (const name of JSON.parse(NEXUS_MODELS)) ids.push((await client.models.retrieve(name)).id);
    return ids;
  },
  unknownModel: () => failure(() => client.chat.completions.create({ ...ask, model: "none" })),
  unknownModelStreamed: () => failure(() => client.chat.completions.create({ ...ask, model: "none", stream: true })),
  wrongKey: () => failure(() => new OpenAI({ ...options, apiKey: "sk-secret-and-wrong" }).models.list()),
  wrongField: () => failure(() => client.chat.completions.create({ ...ask, temperature: "warm" })),
  tooLarge: () => failure(() => client.chat.completions.create({ ...ask, user: "x".repeat(30 << 20) })),
  brokenStream: () =>
    failure(async () => collect(await client.chat.completions.create({ ...ask, stream: true, echo: { fail: "mid", delay_ms: 50 } }))),
  leftStream: async () => {
    const stream = await client.chat.completions.create({ ...ask, stream: true, echo: { delay_ms: 200, tokens: 500 } });
    for await (const chunk of stream) return chunk.choices[0].delta.role;
  },
  requestIds: async () => {
    const first = await client.chat.completions.create(ask);
    const { request_id } = await client.chat.completions.create({ ...ask, stream: true }).withResponse();
    return [first._request_id, request_id];
  },
};

const seen = {};
for (const [name, test] of Object.entries(tests)) {
  try {
    seen[name] = await test();
  } catch (error) {
    seen[name] = { unexpected: String(error.stack ?? error) };
  }
}
console.log(JSON.stringify(seen));
