"""A server of predictions over HTTP: FastAPI on uvicorn, before one thread that computes what all clients ask for."""
