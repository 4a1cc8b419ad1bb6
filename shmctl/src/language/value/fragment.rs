//! Positions of packets in fragmented datagrams.

use super::ParseValueError;
use std::fmt;
use std::str::FromStr;

/// The position of a packet in its datagram.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Fragment {
    /// The whole datagram, without an IPv6 fragment header.
    Whole,
    /// The first fragment, which has the ports. An IPv6 datagram that consists of one fragment with
    /// a fragment header (an atomic fragment, RFC 6946) counts as one.
    First,
    /// A fragment behind the first.
    Later,
}

/// The fragments that a filter rule matches.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FragmentMatch {
    /// `whole`, `first` or `later`: packets in this position.
    Is(Fragment),
    /// `piece`: first and later fragments.
    Any,
}

impl FragmentMatch {
    /// Every value, with its word in commands.
    pub const ALL: [(&str, FragmentMatch); 4] = [
        ("whole", FragmentMatch::Is(Fragment::Whole)),
        ("first", FragmentMatch::Is(Fragment::First)),
        ("later", FragmentMatch::Is(Fragment::Later)),
        ("piece", FragmentMatch::Any),
    ];

    /// Whether a packet in this position matches.
    pub fn contains(self, fragment: Fragment) -> bool {
        match self {
            FragmentMatch::Is(wanted) => fragment == wanted,
            FragmentMatch::Any => fragment != Fragment::Whole,
        }
    }
}

impl FromStr for FragmentMatch {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, ParseValueError> {
        let found = FragmentMatch::ALL.iter().find(|(word, _)| word.eq_ignore_ascii_case(text));
        found.map(|&(_, value)| value).ok_or(ParseValueError)
    }
}

impl fmt::Display for FragmentMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word =
            FragmentMatch::ALL.iter().find(|(_, value)| value == self).map(|(word, _)| *word);
        f.write_str(word.unwrap_or_default())
    }
}
