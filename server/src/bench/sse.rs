//! Reads server-sent events from bytes that arrive in pieces of any size.
//!
//! ```text
//!   "data: {\"a\":" | "1}\n" | "\ndata: [DO" | "NE]\n\n"      pieces as the network cuts them
//!        pending: the unfinished line   data: lines of the unfinished event
//!                                  v
//!            {"a":1}                    [DONE]                one string an event
//! ```
//!
//! Follows the parsing rules of the HTML standard (<https://html.spec.whatwg.org/multipage/server-sent-events.html>) as
//! far as completion streams use them: `data` fields, comments, and the three line endings. Other fields are skipped.

/// Bytes in, data of complete events out.
#[derive(Debug, Default)]
pub struct SseParser {
    /// Bytes of a line whose end has not arrived.
    line: Vec<u8>,
    /// Data of the event whose blank line has not arrived.
    data: Vec<u8>,
    /// A `data` field was seen since the last blank line: an event with empty data is still an event.
    has_data: bool,
    /// The last byte was `\r`, so a `\n` that follows belongs to it.
    after_cr: bool,
}

impl SseParser {
    /// A parser at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes and calls `event` with the data of each event they complete. Invalid UTF-8 is replaced.
    pub fn push(&mut self, bytes: &[u8], mut event: impl FnMut(&str)) {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&b| b == b'\n' || b == b'\r') {
            let (head, tail) = rest.split_at(end);
            let newline_of_crlf = tail[0] == b'\n' && self.after_cr && head.is_empty();
            self.after_cr = tail[0] == b'\r';
            rest = &tail[1..];
            if newline_of_crlf {
                continue;
            }
            if self.line.is_empty() {
                self.end_line(head, &mut event);
            } else {
                self.line.extend_from_slice(head);
                let line = std::mem::take(&mut self.line);
                self.end_line(&line, &mut event);
                self.line = line;
                self.line.clear();
            }
        }
        if !rest.is_empty() {
            self.after_cr = false;
            self.line.extend_from_slice(rest);
        }
    }

    fn end_line(&mut self, line: &[u8], event: &mut impl FnMut(&str)) {
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                event(&String::from_utf8_lossy(&self.data));
            }
            self.data.clear();
            return;
        }
        let (field, value) = match line.iter().position(|&b| b == b':') {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, &[][..]),
        };
        if field != b"data" {
            return;
        }
        if std::mem::replace(&mut self.has_data, true) {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pieces: &[&[u8]]) -> Vec<String> {
        let mut parser = SseParser::new();
        let mut events = Vec::new();
        for piece in pieces {
            parser.push(piece, |data| events.push(data.to_owned()));
        }
        events
    }

    const STREAM: &str = ": keep-alive\n\ndata: {\"text\":\"é\u{1F600}\"}\n\nevent: x\r\ndata: two\r\ndata:lines\r\n\r\n\
                          id: 7\rdata\r\rretry: 1\n\ndata: [DONE]\n\n";

    #[test]
    fn events_comments_and_line_endings() {
        assert_eq!(parse(&[STREAM.as_bytes()]), ["{\"text\":\"é\u{1F600}\"}", "two\nlines", "", "[DONE]"]);
    }

    #[test]
    fn every_split_point_gives_the_same_events() {
        let bytes = STREAM.as_bytes();
        let whole = parse(&[bytes]);
        for cut in 0..=bytes.len() {
            assert_eq!(parse(&[&bytes[..cut], &bytes[cut..]]), whole, "cut at byte {cut}");
        }
        for first in 0..bytes.len() {
            let second = (first + 3).min(bytes.len());
            let pieces = [&bytes[..first], &bytes[first..second], &bytes[second..]];
            assert_eq!(parse(&pieces), whole, "cut at bytes {first} and {second}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(parse(&single), whole, "byte by byte");
    }

    #[test]
    fn an_event_without_its_blank_line_is_not_delivered() {
        assert!(parse(&[b"data: cut off\n"]).is_empty());
        assert_eq!(parse(&[b"data: one\n\ndata: cut"]), ["one"]);
    }

    #[test]
    fn invalid_utf8_is_replaced() {
        assert_eq!(parse(&[b"data: a\xffb\n\n"]), ["a\u{FFFD}b"]);
    }
}
