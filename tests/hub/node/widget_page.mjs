// The Hub's own widget component in a browser.
// usage: node widget_page.mjs CHROMIUM ADDRESS INFO.json PICTURE SCREENSHOT.png  -> {"text", "inputs", "rows"} as JSON
import { build } from "esbuild";
import { execFileSync } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const [executablePath, apiUrl, infoPath, picture, screenshot] = process.argv.slice(2);
const here = dirname(fileURLToPath(import.meta.url));
const made = await mkdtemp(join(tmpdir(), "widget-"));

const bundle = await build({
	stdin: {
		contents: `import { InferenceWidget } from "@huggingface/widgets";
			new InferenceWidget({ target: document.querySelector("main"), props: window.widget });`,
		resolveDir: here,
	},
	bundle: true,
	format: "iife",
	conditions: ["browser", "svelte"],
	write: false,
	logLevel: "silent",
});
// Its classes are Tailwind's, with four greys of the Hub's own: with them a person can judge the screenshot.
const grays = { 350: "#b3bac4", 850: "#18212f", 925: "#0d131f", 950: "#0b0f19" };
const styles = join(here, "node_modules/@huggingface/widgets/src");
const config = { content: [join(styles, "**/*.svelte")], theme: { extend: { colors: { gray: grays } } } };
await writeFile(join(made, "tailwind.config.cjs"), `module.exports = ${JSON.stringify(config)}`);
const rules = "@tailwind base; @tailwind components; @tailwind utilities; main { max-width: 26rem; margin: 2rem; }";
await writeFile(join(made, "in.css"), rules);
const tailwind = join(here, "node_modules/tailwindcss/lib/cli.js");
const args = ["-c", join(made, "tailwind.config.cjs"), "-i", join(made, "in.css"), "-o", join(made, "out.css")];
execFileSync(process.execPath, [tailwind, ...args], { stdio: "ignore", cwd: here });
const css = await readFile(join(made, "out.css"), "utf8");

// A real address: Chromium keeps pages from elsewhere from calling this machine.
const server = createServer().listen(0, "127.0.0.1");
await once(server, "listening");
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
try {
	const page = await browser.newPage({ viewport: { width: 800, height: 500 } });
	const errors = [];
	page.on("pageerror", (error) => errors.push(String(error)));
	const html = `<!doctype html><meta charset="utf-8"><style>${css}</style><main></main>`;
	server.on("request", (_, answer) => answer.setHeader("Content-Type", "text/html").end(html));
	await page.goto(`http://127.0.0.1:${server.address().port}/`);
	const model = JSON.parse(await readFile(infoPath, "utf8"));
	await page.evaluate((props) => (window.widget = props), { apiUrl, model, isLoggedIn: true });
	await page.addScriptTag({ content: bundle.outputFiles[0].text });
	await page.getByText(model.pipeline_tag.replace("-", " ")).first().waitFor(); // the title, in any case of letters
	const inputs = await page.locator("main input[type=file]:enabled").count();
	let rows = [];
	if (inputs && picture !== "-") {
		await page.locator("main input[type=file]").first().setInputFiles(picture);
		await page.getByText(/Computation time on/).waitFor({ timeout: 60000 });
		rows = await page.$$eval("main form div.font-mono.justify-between", (found) =>
			found.map((row) => [...row.querySelectorAll("span")].map((span) => span.textContent.trim()))
		);
		await page.waitForTimeout(500); // the bars fade in
	}
	await page.screenshot({ path: screenshot, fullPage: true });
	const text = await page.locator("main").innerText();
	console.log(JSON.stringify({ text, inputs, rows, errors }));
} finally {
	await browser.close();
	server.close();
}
