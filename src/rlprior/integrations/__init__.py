"""The objectives inside other people's training code: one thin module for each, none imported before it is used."""
