"""What a run tells, and how others listen: typed events, the journal, the run directory, control files, console.

Standard library only; `live` imports rich, and only when a terminal shows progress.
"""
