//! Identifiers that packet marks and the kernel's maps carry.
//!
//! Both kinds share one field of the mark, on different sections of a packet's way; the types keep
//! one from being used as the other.

use std::fmt;

/// The largest identifier: what fits into the identifier field of the mark.
pub const MAX_ID: u32 = 0x0007_ffff;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(u32);

        impl $name {
            /// Returns the identifier with this number, which must be from 1 to [`MAX_ID`].
            pub const fn new(number: u32) -> Option<$name> {
                if number == 0 || number > MAX_ID { None } else { Some($name(number)) }
            }

            /// Returns the number, from 1 to [`MAX_ID`].
            pub const fn get(self) -> u32 {
                self.0
            }
        }

        impl Id for $name {
            fn from_number(number: u32) -> Option<$name> {
                $name::new(number)
            }

            fn number(self) -> u32 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

/// A kind of identifier that [`crate::slots`] allocates.
pub(crate) trait Id: Copy + Ord {
    fn from_number(number: u32) -> Option<Self>;
    fn number(self) -> u32;
}

id! {
    /// The identifier of a slot: a backend of a service, as the fast path knows it.
    SlotId
}
id! {
    /// The identifier of a middlebox, on a packet's way to the engine.
    MiddleboxId
}
