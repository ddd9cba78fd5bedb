"""What users hold in their hands: `Node` and `AsyncNode`, two faces of the same engine."""
