// What the official Node SDK makes of Nexus, as one JSON object on stdout: test name -> what was seen.
import { createReadStream, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import OpenAI, { toFile } from "openai";

const { NEXUS_URL, NEXUS_KEY, NEXUS_MODELS } = process.env;
const options = { baseURL: `${NEXUS_URL}/v1`, apiKey: NEXUS_KEY, maxRetries: 0, timeout: 20_000 };
const client = new OpenAI(options);
const messages = [{ role: "user", content: "one two three" }];
const ask = { model: "echo", messages };

const sound = Buffer.from("RIFF and what follows");
const png = Buffer.from("iVBORw0KGgo=", "base64");
const speak = { model: "echo", voice: "alloy", input: "hello you" };

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
  tooLarge: () => failure(() => client.chat.completions.create({ ...ask, user: "x".repeat(33 << 20) })),
  brokenStream: () =>
    failure(async () => collect(await client.chat.completions.create({ ...ask, stream: true, echo: { fail: "mid", delay_ms: 50 } }))),
  leftStream: async () => {
    const stream = await client.chat.completions.create({ ...ask, stream: true, echo: { delay_ms: 200, tokens: 500 } });
    for await (const chunk of stream) return chunk.choices[0].delta.role;
  },
  embedding: async () => {
    const [packed, plain] = await Promise.all(
      [undefined, "float"].map((encoding_format) =>
        client.embeddings.create({ model: "echo", input: ["to be", "or not"], dimensions: 8, encoding_format })),
    );
    return [packed.data.map((item) => item.embedding), plain.data.map((item) => item.embedding)];
  },
  tokenIds: async () => (await client.embeddings.create({ model: "echo", input: [[1, 2], [3]] })).data.length,
  image: async () => {
    const { data } = await client.images.generate({ model: "echo", prompt: "a cat", n: 2, size: "64x64" });
    return data.map((item) => item.b64_json.slice(0, 8));
  },
  imageUrl: async () => {
    const { data } = await client.images.generate({ model: "echo", prompt: "a cat", response_format: "url" });
    const shown = await fetch(data[0].url);
    return [shown.status, shown.headers.get("content-type")];
  },
  imageStream: async () => {
    const stream = await client.images.generate({ model: "echo", prompt: "a cat", stream: true, partial_images: 1 });
    return (await collect(stream)).map((event) => event.type);
  },
  edit: async () => {
    const image = [await toFile(png, "a.png", { type: "image/png" }), await toFile(png, "b.png")];
    const { data } = await client.images.edit({ model: "echo", prompt: "a hat", image, mask: await toFile(png, "m.png"), n: 2 });
    return data.length;
  },
  speech: async () => {
    const answer = await client.audio.speech.create({ ...speak, response_format: "wav" });
    const data = Buffer.from(await answer.arrayBuffer());
    return [answer.headers.get("content-type"), data.subarray(0, 4).toString(), data.length];
  },
  speechStream: async () => {
    const answer = await client.audio.speech.create({ ...speak, response_format: "pcm", echo: { fail: "hang_mid" } });
    for await (const piece of answer.body) return piece.length > 0;
  },
  speechEvents: async () => {
    const answer = await client.audio.speech.create({ ...speak, response_format: "pcm", stream_format: "sse" });
    const frames = (await answer.text()).split("\n\n").filter((frame) => frame.includes("data: {"));
    return frames.map((frame) => JSON.parse(frame.split("data: ")[1]).type);
  },
  transcription: async () => {
    const path = join(tmpdir(), `nexus-${process.pid}.wav`);
    writeFileSync(path, sound);
    const files = [createReadStream(path), await toFile(sound, "日本.wav"), new File([sound], "a.wav", { type: "audio/wav" })];
    const texts = [];
    for (const file of files) texts.push((await client.audio.transcriptions.create({ model: "echo", file })).text);
    rmSync(path);
    return texts;
  },
  transcriptionFormats: async () => {
    const ask = (options) => client.audio.transcriptions.create({ model: "echo", file: new File([sound], "a.wav"), ...options });
    const verbose = await ask({ response_format: "verbose_json", timestamp_granularities: ["word", "segment"] });
    return [await ask({ response_format: "vtt" }), verbose.words.length, verbose.segments.length];
  },
  transcriptionStream: async () => {
    const file = new File([sound], "a.wav");
    return (await collect(await client.audio.transcriptions.create({ model: "echo", file, stream: true }))).map((event) => event.type);
  },
  translation: async () => (await client.audio.translations.create({ model: "echo", file: new File([sound], "a.wav") })).text,
  emptyFile: () => failure(() => client.audio.transcriptions.create({ model: "echo", file: new File([], "a.wav") })),
  wrongSize: () => failure(() => client.images.generate({ model: "echo", prompt: "x", size: "huge" })),
  wrongKeyUpload: () =>
    failure(() => new OpenAI({ ...options, apiKey: "sk-secret-and-wrong" }).audio.transcriptions.create({ model: "echo", file: new File([Buffer.alloc(24 << 20)], "a.wav") })),
  response: () => client.responses.create({ model: "echo", input: "one two three" }),
  responseHelper: async () => {
    const stream = client.responses.stream({ model: "echo", input: "one two three" });
    const events = await collect(stream);
    return [events.map((event) => event.type), (await stream.finalResponse()).output_text];
  },
  responseResumed: async () => {
    const { id } = await client.responses.create({ model: "echo", input: "one two three", background: true });
    while (["queued", "in_progress"].includes((await client.responses.retrieve(id)).status));
    const events = await collect(await client.responses.retrieve(id, { stream: true, starting_after: 4 }));
    const items = await collect(await client.responses.inputItems.list(id));
    const cancelled = (await client.responses.cancel(id)).status;
    await client.responses.delete(id);
    return [events.map((event) => event.sequence_number), events.at(-1).response.output[0].content[0].text, items.length, cancelled];
  },
  responseCancelled: () => failure(async () => client.responses.cancel((await client.responses.create({ model: "echo", input: "hi" })).id)),
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
