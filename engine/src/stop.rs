//! Stop texts, found across token boundaries without showing any part of them early.
//!
//! ```text
//!   text so far   "... and then\n#"          stop text "\n###"
//!   shown         "... and then"
//!   held back                  "\n#"         the longest end that may still become a stop text
//! ```

/// Finds the stop text that completes first; the same for any way of cutting the text into pieces.
#[derive(Debug)]
pub(crate) struct StopMatcher {
    strings: Vec<String>,
    include: bool,
    held: String,
}

impl StopMatcher {
    /// A matcher for `strings`, none of them empty; `include` shows the stop text as part of the answer.
    pub(crate) fn new(strings: Vec<String>, include: bool) -> Self {
        Self { strings, include, held: String::new() }
    }

    /// Takes more text and appends what can be shown. Gives the stop text when it is complete; what follows is dropped.
    pub(crate) fn push(&mut self, more: &str, shown: &mut String) -> Option<&str> {
        if self.strings.is_empty() {
            shown.push_str(more);
            return None;
        }
        self.held.push_str(more);
        let matched = self
            .strings
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start + stop.len(), start, stop)))
            .min_by_key(|(end, start, _)| (*end, *start));
        if let Some((end, start, stop)) = matched {
            shown.push_str(&self.held[..if self.include { end } else { start }]);
            self.held.clear();
            return Some(stop);
        }
        let hold = self.strings.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let show = self.held.len() - hold;
        shown.push_str(&self.held[..show]);
        self.held.drain(..show);
        None
    }

    /// The answer ended otherwise: what was held back is shown.
    pub(crate) fn finish(&mut self, shown: &mut String) {
        shown.push_str(&self.held);
        self.held.clear();
    }
}

/// Length of the longest end of `text` that is a beginning of `stop`, and not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|len| text.ends_with(&stop[..*len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pieces: &[&str], stops: &[&str], include: bool) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.iter().map(ToString::to_string).collect(), include);
        let mut shown = String::new();
        for piece in pieces {
            if let Some(stop) = matcher.push(piece, &mut shown) {
                let stop = stop.to_string();
                return (shown, Some(stop));
            }
        }
        matcher.finish(&mut shown);
        (shown, None)
    }

    /// What the definition says, character by character.
    fn by_definition(text: &str, stops: &[&str], include: bool) -> (String, Option<String>) {
        for (start, c) in text.char_indices() {
            let seen = &text[..start + c.len_utf8()];
            let longest = stops.iter().filter(|stop| seen.ends_with(**stop)).max_by_key(|stop| stop.len());
            if let Some(stop) = longest {
                let end = if include { seen.len() } else { seen.len() - stop.len() };
                return (seen[..end].to_string(), Some((*stop).to_string()));
            }
        }
        (text.to_string(), None)
    }

    #[test]
    fn every_cut_agrees_with_the_definition() {
        let texts = ["abcabcabd and so on", "aaab", "x\n##\n### y", "héé日本語 é", "", "ab"];
        let stops: [&[&str]; 9] = [
            &["abd"],
            &["cab", "abcab"],
            &["aab", "ab"],
            &["\n###", "##\n"],
            &["é日", "本"],
            &["zzz"],
            &[],
            &["abcabcabd and so on!"],
            &["b", "abc"],
        ];
        for text in texts {
            let cuts: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
            for (stops, include) in stops.iter().flat_map(|stops| [(stops, false), (stops, true)]) {
                let expected = by_definition(text, stops, include);
                for &a in &cuts {
                    for &b in cuts.iter().filter(|b| **b >= a) {
                        let pieces = [&text[..a], &text[a..b], &text[b..]];
                        assert_eq!(run(&pieces, stops, include), expected, "{pieces:?} with {stops:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn only_a_possible_stop_is_held_back() {
        let mut matcher = StopMatcher::new(vec!["STOP".into()], false);
        let mut shown = String::new();
        matcher.push("one ST", &mut shown);
        assert_eq!(shown, "one ");
        matcher.push("IR", &mut shown);
        assert_eq!(shown, "one STIR");
    }
}
