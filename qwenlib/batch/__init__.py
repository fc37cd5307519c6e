"""Running notebooks in batch: typed parameters, stage graph, strict papermill runner, report."""
