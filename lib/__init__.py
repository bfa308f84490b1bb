"""Proof & Probe: the small library under the book.

Rooms, from the ground up: `models` and `tasks`; `metrics` (pure functions of tensors and numbers); `training`
and `sweeps` (runs); `experiments` (one run, one row); `evidence` (what was measured, by what, the verdict)
and `figures`; `pipeline` (chapters to book). Imports point one way, from later rooms to earlier. Nothing
here knows a chapter.
"""
