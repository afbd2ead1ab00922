"""The life of a batch: config, data, loss, parallel, optim, checkpoint, loop."""
