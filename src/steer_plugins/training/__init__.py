"""From a behaviour to a vector: traits and pairs (``traits``), directions (``extract``), doses (``calibrate``), gates."""
