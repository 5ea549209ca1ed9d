"""Raw text in any form -> documents and sentences."""
