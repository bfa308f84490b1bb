"""From `book/` to `build/html`: papermill executes, a content hash reuses, Jupyter Book renders.

Run it as `python -m lib.pipeline book|chapter|evidence`, or through `make`. Reading order: `layout` (what
the book consists of), `request` (what the reader asked for, checked), `cache` (what need not run again),
`execute` (papermill), `facts` (tables of times and machines), `stage` (the folder that is rendered), `render`
(Jupyter Book), `build` (all of it); `ahead` and `progress` are what is told before and meanwhile.
"""
