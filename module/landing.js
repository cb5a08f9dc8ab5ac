'use strict'
const copy = document.getElementById('copy').content.firstElementChild
const said = document.getElementById('said')
for (const block of document.querySelectorAll('.block')) {
  const button = copy.cloneNode(true)
  button.addEventListener('click', async () => {
    const text = block.querySelector('pre').textContent
    try {
      await navigator.clipboard.writeText(text)
    } catch {
      // Pages without TLS have no clipboard; the selection can be copied.
      getSelection().selectAllChildren(block.querySelector('pre'))
      if (!document.execCommand('copy')) return
    }
    const before = button.textContent
    button.textContent = said.textContent = button.dataset.done
    setTimeout(() => { button.textContent = before; said.textContent = '' }, 2000)
  })
  block.append(button)
}
const open = () => {
  const of = document.getElementById(decodeURIComponent(location.hash.slice(1)))
  if (of instanceof HTMLDetailsElement) of.open = true
}
addEventListener('hashchange', open)
open()
