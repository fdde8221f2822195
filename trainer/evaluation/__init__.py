"""What a model is worth: predictions of whole splits over all processes, the tasks' metrics of them (`scoring`, the
way in), and the prediction files.
"""
