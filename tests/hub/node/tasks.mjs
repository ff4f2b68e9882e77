// What Hugging Face's tables (npm @huggingface/tasks) say.
// usage: node tasks.mjs             -> the tables that this package has copies of
//        node tasks.mjs INFO.json   -> what they make of an answer of model_info
import { LIBRARY_TASK_MAPPING, MODEL_LIBRARIES_UI_ELEMENTS, PIPELINE_TYPES_SET } from "@huggingface/tasks";
import { readFile } from "node:fs/promises";

if (process.argv.length < 3) {
	const libraries = Object.keys(MODEL_LIBRARIES_UI_ELEMENTS);
	console.log(JSON.stringify({ tasks: [...PIPELINE_TYPES_SET], libraries, mapping: LIBRARY_TASK_MAPPING }));
} else {
	const info = JSON.parse(await readFile(process.argv[2], "utf8"));
	const library = MODEL_LIBRARIES_UI_ELEMENTS[info.library_name];
	console.log(
		JSON.stringify({
			library: library?.prettyLabel ?? null,
			task: PIPELINE_TYPES_SET.has(info.pipeline_tag),
			pair: LIBRARY_TASK_MAPPING[info.library_name]?.includes(info.pipeline_tag) ?? false,
			snippets: library?.snippets?.(info) ?? [],
		})
	);
}
