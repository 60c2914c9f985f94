"""From text to batches: sources -> documents -> tokens -> packed rows -> batches of this host.

    sources.open_source          any source of documents, by number: a file of this folder for each format
    tokenizer.load_tokenizer     a given tokenizer.json, or a BPE trained on the documents
    order.split                  training and held-out documents
    packing, filters             documents -> rows of `sequence_length` tokens
    pipeline.make_train_iterator the batches of one host, resumable
    evaluation.evaluation_rows   held-out rows by label
    tokenize.tokenize            documents -> token shards    (tokenization, write_shard, copies, beam; shards, verify)
    inspect, window              what a dataset, and what the rows of a run hold
"""
