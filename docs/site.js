// Long names in tables and lists may break behind a slash or an underscore, and nowhere else.
document.querySelectorAll(".md-typeset td code, .md-typeset li code").forEach((code) => {
  const parts = code.textContent.split(/(?<=[/_])(?=\w)/)
  if (code.children.length === 0 && parts.length > 1)
    code.replaceChildren(...parts.flatMap((part) => [part, document.createElement("wbr")]).slice(0, -1))
})
