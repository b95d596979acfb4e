"""REST: OpenAI's protocol over the gateway's sessions."""
