"""Is a separator a summary of its segment, or a sink? Text with facts to recall, interventions on trained models."""
