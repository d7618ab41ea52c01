"""Images from any base model and adapters: `simpletuner generate`."""
