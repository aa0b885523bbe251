"""The first minutes on a GPU: a runner of stages, `drive` (the kernels without torch), and the fit that reads what they leave."""
