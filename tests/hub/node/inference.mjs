// What npm's @huggingface/inference makes of the server's answers.  usage: node inference.mjs ADDRESS PICTURE
import { InferenceClient, imageClassification } from "@huggingface/inference";
import { readFile } from "node:fs/promises";

const [address, picture] = process.argv.slice(2);
const data = new Blob([await readFile(picture)], { type: "image/jpeg" });
const byFunction = await imageClassification({ endpointUrl: address, data });
const byEndpoint = await new InferenceClient().endpoint(address).imageClassification({ data });
console.log(JSON.stringify({ byFunction, byEndpoint }));
