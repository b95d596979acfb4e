"""Workers as the agent has them: processes, links, logs, the pool of pre-started ones."""
