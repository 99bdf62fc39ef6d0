"""What separators do: in a corpus, in the attention of a trained model, and in its loss.

runs        a trained run opened for reading: weights, held-out samples
evaluation  losses of each token of a model under any attention pattern
recall      which tokens repeat a bigram that lies outside the window
variations  attention patterns derived from another: without a class, with other windows, with as many pairs
losses      the loss command: a trained model under other patterns
mass        attention probabilities of a trained model, summed by kind of key and distance
attention   the attention command
corpus      the corpus command: density and gaps of separators by domain
recovery    losses of post-trained runs beside those of the models that they began with
report      JSON, Markdown and pictures of a result
"""
