// Our gradio page in a browser: a picture through each tab.
// usage: node demo_page.mjs CHROMIUM ADDRESS PICTURE NOT_A_PICTURE SCREENSHOTS   -> what the page shows, as JSON
import { chromium } from "playwright-core";

const [executablePath, address, picture, broken, screenshots] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
try {
	const page = await browser.newPage({ viewport: { width: 1200, height: 900 } });
	page.setDefaultTimeout(60000);
	const errors = [];
	const elsewhere = [];
	page.on("pageerror", (error) => errors.push(String(error)));
	await page.route(
		(url) => url.hostname !== "127.0.0.1" && url.protocol.startsWith("http"),
		(route) => (elsewhere.push(route.request().url()), route.abort())
	);
	await page.goto(address);
	const give = async (file) => {
		await page.locator("input[type=file]:visible, [role=tabpanel]:visible input[type=file]").first().setInputFiles(file);
	};

	await page.getByRole("tab", { name: "Classification" }).click();
	await give(picture);
	await page.locator('img[src*="/file="]:visible').first().waitFor();
	await page.getByRole("button", { name: "Classify" }).click();
	await page.locator("[data-testid=label-output-value]").waitFor();
	const best = (await page.locator("[data-testid=label-output-value]").innerText()).trim();
	const rows = await page.locator("[data-testid$=confidence-set]").allInnerTexts();
	await page.screenshot({ path: `${screenshots}/demo_classification.png` });

	await page.getByRole("tab", { name: "Reconstruction" }).click();
	await give(picture);
	await page.locator('img[src*="/file="]:visible').first().waitFor();
	await page.getByLabel("block").check();
	await page.getByLabel(/number input for Mask ratio/i).fill("0.5");
	await page.getByRole("button", { name: "Reconstruct" }).click();
	await page.locator(".gallery-item, .thumbnail-item, .thumbnail-lg").nth(3).waitFor();
	const pictures = page.locator(".gallery-item img, .thumbnail-item img, .thumbnail-lg img");
	await page.waitForFunction(() => [...document.images].every((image) => image.complete));
	const sizes = await pictures.evaluateAll((images) => images.map((i) => [i.naturalWidth, i.naturalHeight]));
	const captions = await page.locator(".caption-label").allInnerTexts();
	await page.screenshot({ path: `${screenshots}/demo_reconstruction.png`, fullPage: true });

	// What goes wrong is said on the page, each in a new visit.
	const refusal = async (file) => {
		await page.goto(address);
		await page.getByRole("tab", { name: "Classification" }).click();
		if (file) {
			await give(file);
			await page.locator('img[src*="/file="]:visible').first().waitFor({ state: "attached" });
		}
		await page.getByRole("button", { name: "Classify" }).click();
		const toast = page.locator(".toast-body").first();
		await toast.waitFor();
		await page.waitForTimeout(700); // it slides in
		return toast.innerText();
	};
	const refused = { empty: await refusal(null), broken: await refusal(broken) };
	await page.screenshot({ path: `${screenshots}/demo_refused.png` });
	console.log(JSON.stringify({ best, rows, sizes, captions, refused, errors, elsewhere }));
} finally {
	await browser.close();
}
