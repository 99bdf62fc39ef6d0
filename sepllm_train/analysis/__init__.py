"""Effects of separators: in a corpus, in the attention of a trained model, and in its loss.

losses     the loss command: a trained model under other patterns
ablation   the ablate command: some of the separators, and other tokens at as many keys
attention  the attention command
mass       attention probabilities of a trained model, summed by kind of key and distance
corpus     the corpus command: density and gaps of separators by domain
recovery   losses of post-trained runs beside those of the models that they began with
match      intervals, windows and thinning that keep as many keys as another pattern
probe      interventions on the values of separators, and recall
plots      pictures
report     results on disk, cells of tables
"""
