// The JavaScript client of the Hub.  usage: node hub.mjs HUB REPO TOKEN   -> what it read, and after writing a file
import { downloadFile, fileExists, listFiles, modelInfo, uploadFile } from "@huggingface/hub";
import { createHash } from "node:crypto";

const [hubUrl, name, accessToken] = process.argv.slice(2);
const at = { hubUrl, accessToken, repo: { type: "model", name } };
const info = await modelInfo({ ...at, name, additionalFields: ["library_name", "sha"] });
const hashes = {};
for await (const file of listFiles({ ...at, recursive: true })) {
	const content = await (await downloadFile({ ...at, path: file.path, xet: false })).arrayBuffer();
	hashes[file.path] = createHash("sha256").update(Buffer.from(content)).digest("hex");
}
const content = new Blob(["from JavaScript"]);
await uploadFile({ ...at, file: { path: "note.txt", content }, useXet: false });
console.log(JSON.stringify({ info, hashes, written: await fileExists({ ...at, path: "note.txt" }) }));
