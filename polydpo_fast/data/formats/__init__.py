"""What pairs are kept in.

`parquet`, `manifest`, `tar` and `records` are sources; each stands on those that are named after it, and two of them on
`indexed`. `columns` and `fields` say what columns and fields mean, `files` and `remote` where files are found, `splits`
which of them are not for training, `media` what is an image or a clip.
"""
