// Asks the server of `report.py --follow` for news, and puts them into the page without moving what the reader does.
"use strict";

const EVERY = 2000; // milliseconds

// The parsed text is a document of its own: no script in it runs.
function takeOver(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html");
  FACTS = JSON.parse(fresh.getElementById("data").textContent);
  for (const id of ["headlines", "summary", "settings"]) byId(id).replaceWith(document.importNode(fresh.getElementById(id), true));
  document.title = fresh.title;
  drawAll();
}

async function lookForNews() {
  const said = byId("following");
  try {
    const answer = await fetch("/update?since=" + encodeURIComponent(FACTS.version), { cache: "no-store" });
    if (answer.status === 200) takeOver(await answer.text());
    said.textContent = answer.status === 503 ? `Waiting: ${await answer.text()}` : `Following: ${FACTS.progress}.`;
  } catch {
    said.textContent = "The server has ended, or cannot be reached. This is the last state that it sent.";
  }
  setTimeout(lookForNews, EVERY);
}

lookForNews();
