// OpenAI's client for Node: node openai.mjs URL KEY MODEL ECHO_URL; prints one JSON record of what each call gave.
import OpenAI from 'openai';

const [url, key, model, echoUrl] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const echo = new OpenAI({ baseURL: `${echoUrl}/v1`, apiKey: 'none', maxRetries: 0 });
const messages = [{ role: 'user', content: 'hello' }];
const found = {};

async function errorOf(promise) {
  try {
    await promise;
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
  return null;
}

found.models = (await client.models.list()).data.map((one) => one.id);

const whole = await client.chat.completions.create({ model, messages, max_tokens: 6, temperature: 0 });
const streamed = { text: '', usage: null };
for await (const chunk of await client.chat.completions.create({
  model, messages, max_tokens: 6, temperature: 0, stream: true, stream_options: { include_usage: true },
})) {
  streamed.text += chunk.choices[0]?.delta.content ?? '';
  streamed.usage = chunk.usage ?? streamed.usage;
}
found.chat = { whole: whole.choices[0].message.content, usage: whole.usage, streamed };

found.completions = (await client.completions.create({ model, prompt: ['a', 'b'], max_tokens: 2, n: 2 })).choices.length;
found.helper = (
  await client.chat.completions.stream({ model, messages, max_tokens: 4 }).finalChatCompletion()
).choices[0].finish_reason;

const call = { id: 'c', type: 'function', function: { name: 'f', arguments: '{"city": "Paris"}' } };
found.history = (await client.chat.completions.create({
  model, max_tokens: 1,
  messages: [...messages, { role: 'assistant', content: null, tool_calls: [call] },
    { role: 'tool', tool_call_id: 'c', content: 'sunny' }],
})).usage.prompt_tokens;

const tooLong = [{ role: 'user', content: 'word '.repeat(5000) }];
found.overflow = await errorOf(client.chat.completions.create({ model, messages: tooLong, stream: true }));
found.wrongKey = await errorOf(new OpenAI({ baseURL: `${url}/v1`, apiKey: 'wrong', maxRetries: 0 }).models.list());
found.wrongModel = await errorOf(client.chat.completions.create({ model: 'nope', messages }));
found.wrongValue = await errorOf(client.chat.completions.create({ model, messages, temperature: 9 }));

const prompt = '世界 🙂 naïve 👩‍🚀 мир';
const pieces = [];
for await (const chunk of await echo.completions.create({ model: 'echo', prompt, max_tokens: 40, stream: true })) {
  pieces.push(chunk.choices[0].text);
}
found.pieces = pieces;
found.stopped = (await echo.completions.create({ model: 'echo', prompt, max_tokens: 40, stop: ['🚀'] })).choices[0];

const left = await echo.completions.create({ model: 'echo', prompt: 'hello', max_tokens: 1000, stream: true });
for await (const chunk of left) {
  found.left = chunk.choices.length;
  break; // the client aborts the request
}

await new Promise((resolve) => setTimeout(resolve, 6000));
found.afterPause = (await client.completions.create({ model, prompt: 'a', max_tokens: 1 })).choices.length;

// Two held requests are all that the server takes: a third is refused, and comes again when the server asks it to.
const held = [];
for (let at = 0; at < 2; at++) {
  const stream = await echo.completions.create({ model: 'echo', prompt: 'hello', max_tokens: 1000, stream: true });
  await stream[Symbol.asyncIterator]().next();
  held.push(stream);
}
found.refused = await errorOf(echo.completions.create({ model: 'echo', prompt: 'abc', max_tokens: 3 }));
const started = Date.now();
const again = echo.completions.create({ model: 'echo', prompt: 'abc', max_tokens: 3 }, { maxRetries: 1 });
setTimeout(() => held.forEach((stream) => stream.controller.abort()), 1500);
found.retried = { text: (await again).choices[0].text, seconds: (Date.now() - started) / 1000 };

console.log(JSON.stringify(found));
process.exit(0);
