"""Generator of the references and example files that repeat what the code says: `python -m docs.generator`.

Each module returns the text of one kind of file. `tests/repository/test_generated_files.py` compares the committed files.
"""
