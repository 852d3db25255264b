// A request as code that anybody can run. The picture stands there by its file's name.

import { base } from "./api.js";

const PLACE = "%PICTURE%";

/** A body with a mark where the picture was, without what only this page asks for. */
function shortened(body) {
  const { logprobs, top_logprobs, stream_options, ...rest } = body; // eslint-disable-line no-unused-vars
  return JSON.parse(JSON.stringify(rest), (name, value) =>
    (name === "url" && value.startsWith("data:")) ? PLACE : value);
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function asCurl(body, picture) {
  const [before, after] = JSON.stringify(shortened(body)).split(PLACE);
  return [
    `{ printf %s ${quoted(`${before}data:;base64,`)}; base64 < ${quoted(picture)} | tr -d '\\n'; printf %s ${quoted(after)}; } |`,
    `  curl -s ${quoted(new URL("v1/chat/completions", base).href)} \\`,
    "    -H 'content-type: application/json' -H \"authorization: Bearer $BLIP2_API_KEY\" -d @-",
  ].join("\n");
}

export function asPython(body, picture) {
  const { model, messages, ...fields } = shortened(body);
  const own = ["temperature", "top_p", "max_tokens"]; // that OpenAI's client knows
  const known = Object.entries(fields).filter(([name]) => own.includes(name));
  const extra = Object.fromEntries(Object.entries(fields).filter(([name]) => !own.includes(name)));
  const python = (value) => JSON.stringify(value).replaceAll(JSON.stringify(PLACE), "url");
  return [
    "import base64, os, openai",
    "",
    `client = openai.OpenAI(base_url=${python(new URL("v1", base).href)}, api_key=os.getenv("BLIP2_API_KEY", "unused"))`,
    `picture = base64.b64encode(open(${python(picture)}, "rb").read()).decode()`,
    'url = f"data:;base64,{picture}"',
    "answer = client.chat.completions.create(",
    `    model=${python(model)},`,
    `    messages=${python(messages)},`,
    ...known.map(([name, value]) => `    ${name}=${python(value)},`),
    ...(Object.keys(extra).length ? [`    extra_body=${python(extra)},`] : []),
    ")",
    "print(answer.choices[0].message.content)",
    "",
  ].join("\n");
}
