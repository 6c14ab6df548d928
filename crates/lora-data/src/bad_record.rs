//! Which faults are one record's.

use crate::error::DataError;

impl DataError {
    /// Whether one record is at fault, so that a policy of skipping may pass over it; all else is a fault of the file,
    /// of the settings or of the whole set.
    pub fn is_bad_record(&self) -> bool {
        match self {
            Self::LineTooLong { .. }
            | Self::Utf8 { .. }
            | Self::FieldUtf8 { .. }
            | Self::Json { .. }
            | Self::NotAnObject { .. }
            | Self::MissingField { .. }
            | Self::WrongType { .. }
            | Self::Row { .. }
            | Self::CsvWidth { .. }
            | Self::NoSeparator { .. }
            | Self::EmptyConversation { .. }
            | Self::ShareGptRole { .. }
            | Self::RoleOrder { .. }
            | Self::SamePair { .. }
            | Self::SameAnswers { .. }
            | Self::TokenOutOfRange { .. }
            | Self::LabelsLength { .. }
            | Self::LabelMismatch { .. } => true,
            Self::AtRecord { source, .. } => matches!(
                **source,
                Self::TemplateRender { .. }
                    | Self::TemplateOutput { .. }
                    | Self::TemplateMarker { .. }
                    | Self::Encode { .. }
                    | Self::EncodePanic { .. }
            ),
            _ => false,
        }
    }
}
