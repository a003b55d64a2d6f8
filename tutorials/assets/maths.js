// Sets every formula that pymdownx.arithmatex marked, with the KaTeX beside this file.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const source = element.textContent.trim() // \( ... \) in a line, \[ ... \] on its own
    katex.render(source.slice(2, -2), element, { displayMode: source.startsWith("\\["), throwOnError: false, strict: "warn" })
  }
})
