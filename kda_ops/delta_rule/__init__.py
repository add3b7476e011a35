"""The delta rule: chunked for whole sequences, recurrent for decode steps."""
