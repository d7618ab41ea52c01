"""What a run will need, before it is started: memory, disk and time, and which settings fit a card. No torch."""
