'use strict'
const copy = document.getElementById('copy').content.firstElementChild
const said = document.getElementById('said')
let blocks = 0
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
    button.textContent = said.textContent = button.dataset.done
    clearTimeout(button.timer)
    button.timer = setTimeout(() => { button.textContent = copy.textContent; said.textContent = '' }, 2000)
  })
  const pre = block.querySelector('pre')
  pre.id = 'block-' + blocks++
  button.setAttribute('aria-describedby', pre.id)
  block.append(button)
}
const open = () => {
  const of = document.getElementById(decodeURIComponent(location.hash.slice(1)))
  if (of instanceof HTMLDetailsElement) of.open = true
}
addEventListener('hashchange', open)
open()
