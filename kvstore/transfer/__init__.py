"""The transfer plane: how the KV blocks of one worker reach another's memory, checked and fenced."""
