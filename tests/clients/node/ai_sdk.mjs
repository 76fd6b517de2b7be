// Vercel's AI SDK: node ai_sdk.mjs URL KEY MODEL ECHO_URL; prints one JSON record of what each call gave.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, streamText, tool, jsonSchema, APICallError } from 'ai';

const [url, key, model, echoUrl] = process.argv.slice(2);
const options = { name: 'penstock', includeUsage: true };
const served = createOpenAICompatible({ ...options, baseURL: `${url}/v1`, apiKey: key });
const echo = createOpenAICompatible({ ...options, baseURL: `${echoUrl}/v1`, apiKey: 'none' });
const call = { model: served(model), prompt: 'hello', maxOutputTokens: 6, maxRetries: 0, temperature: 0 };
const found = {};

async function errorOf(promise) {
  try {
    await promise;
  } catch (error) {
    const body = APICallError.isInstance(error) ? JSON.parse(error.responseBody).error : {};
    return { api: APICallError.isInstance(error), status: error.statusCode, code: body.code, again: error.isRetryable };
  }
  return null;
}

const whole = await generateText(call);
const stream = streamText(call);
let text = '';
for await (const piece of stream.textStream) text += piece;
found.chat = {
  whole: whole.text, reason: whole.finishReason, usage: whole.usage,
  streamed: { text, reason: await stream.finishReason, usage: await stream.usage },
};

found.completion = (await generateText({ ...call, model: served.completionModel(model) })).usage.outputTokens;
found.history = (await generateText({
  ...call, prompt: undefined,
  messages: [
    { role: 'user', content: 'weather?' },
    { role: 'assistant', content: [
      { type: 'tool-call', toolCallId: 'c', toolName: 'get_weather', input: { city: 'Paris' } }] },
    { role: 'tool', content: [
      { type: 'tool-result', toolCallId: 'c', toolName: 'get_weather', output: { type: 'text', value: 'sunny' } }] },
  ],
})).usage.inputTokens;

found.overflow = await errorOf(generateText({ ...call, prompt: 'word '.repeat(5000) }));
found.wrongModel = await errorOf(generateText({ ...call, model: served('nope') }));
const wrong = createOpenAICompatible({ ...options, baseURL: `${url}/v1`, apiKey: 'wrong' });
found.wrongKey = await errorOf(generateText({ ...call, model: wrong(model) }));
const tools = { f: tool({ description: 'd', inputSchema: jsonSchema({ type: 'object', properties: {} }) }) };
found.tools = await errorOf(generateText({ ...call, tools }));

const prompt = '世界 🙂 naïve 👩‍🚀 мир';
const echoed = streamText({ ...call, model: echo.completionModel('echo'), prompt, maxOutputTokens: 60 });
found.unicode = '';
for await (const piece of echoed.textStream) found.unicode += piece;

const controller = new AbortController();
const left = streamText({
  ...call, model: echo.completionModel('echo'), maxOutputTokens: 1000, abortSignal: controller.signal,
});
for await (const piece of left.textStream) {
  found.left = piece.length > 0;
  controller.abort();
  break;
}

console.log(JSON.stringify(found));
process.exit(0);
