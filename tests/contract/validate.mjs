// Parse the AsyncAPI document on standard input; print what the official parser finds, as JSON.
import { Parser } from "@asyncapi/parser";

let text = "";
for await (const piece of process.stdin) text += piece;
const { document, diagnostics } = await new Parser().parse(text);
process.stdout.write(
  JSON.stringify({
    channels: document ? document.channels().all().map((channel) => channel.address()) : null,
    messages: document ? document.allMessages().all().map((message) => message.name()) : null,
    diagnostics: diagnostics.map(({ severity, code, message, path }) => ({
      severity,
      code,
      message,
      path: path.join("."),
    })),
  }),
);
